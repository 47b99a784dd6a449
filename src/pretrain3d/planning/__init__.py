"""Planning: patch, batch, pyramid levels and anchors from the statistics of a store and the memory of a device."""
