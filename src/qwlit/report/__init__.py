"""Compare runs by their settings, results and events. This package reads run folders and trains nothing."""
