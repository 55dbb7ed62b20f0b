"""What keeps a run alive or ends it cleanly: guard, hang watchdog, signals and requeues, consistency of ranks."""
