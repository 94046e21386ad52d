"""What a decoder is trained to make small, besides the pixels' difference."""
