"""The ledger: how runs differ in settings, results and events. Reads run folders and trains nothing."""
