"""The verification of a served adapter: log-probabilities of a server, or of an engine here, beside lorary's own."""
