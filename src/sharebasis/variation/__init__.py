"""What layers share: their distances once the freedoms of gauge are removed."""
