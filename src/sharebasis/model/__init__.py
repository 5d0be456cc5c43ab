"""A model of the hub: loaded, explored, hooked, changed."""
