"""Several replicas of the engine as a Ray Serve application."""
