"""Files of pictures as anybody may have made them: what is in them, what is left out, and what is refused."""
