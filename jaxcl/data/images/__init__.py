"""Images of rows: how a row names them, decoding, tiles, and the tokens that they become."""
