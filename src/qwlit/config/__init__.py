"""RunConfig: compose, check and explain the settings of a run."""
