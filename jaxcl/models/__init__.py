"""What a network computes: decoder, encoder, gates, attention and its probe, generation."""
