"""The comparison of methods: its record, its statistics, and its page."""
