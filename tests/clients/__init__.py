"""Other programs as clients of exported adapters: scripts that need an environment of their own, and no test run."""
