"""JSON and YAML that others wrote."""
