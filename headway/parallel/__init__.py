"""Where tensors live: the mesh, and every collective of the code base."""
