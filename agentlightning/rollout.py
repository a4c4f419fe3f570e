"""Rollouts, attempts, spans, resources and workers, as plain types."""
