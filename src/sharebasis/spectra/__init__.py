"""artifacts/spectra: offers and what they lose."""
