"""Take in what is quantized already: checkpoints in folders, and layers of other libraries in memory."""
