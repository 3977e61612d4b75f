"""Any number of images through models, by Ray Data: streaming, resumable, each row once in the output."""
