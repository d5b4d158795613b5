"""`attn_implementation="dp_flash"`: exact attention in which no privacy unit sees another, and how models come to use it."""
