"""Records in, records out: formats, conversations, atomic outputs, journals and manifests."""
