"""The steps of `lorary demo`: its folder, the run, and the report."""
