"""The steps of `lorary lorahub`: its adapters and examples, and the report."""
