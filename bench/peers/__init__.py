"""Other engines beside ours, on the same prompts and lengths: `python -m bench peers`."""
