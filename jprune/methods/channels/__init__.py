"""Methods that remove channels, heads and other units of groups: each file reads like its paper's algorithm box."""
