"""The ledger: what runs were, how they differed and what came of it. Reads run folders, never runs."""
