"""What every stage script has around it: paths, settings, errors, provenance."""
