"""The demo: a small model trained for this project and the text to quantize and measure it with."""
