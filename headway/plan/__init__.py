"""What a config costs on a mesh: bytes in memory and on the network, and seconds of a step."""
