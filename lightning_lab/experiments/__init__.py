"""Before and after runs."""
