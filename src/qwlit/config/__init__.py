"""RunConfig: composing, checking and deriving what crosses components."""
