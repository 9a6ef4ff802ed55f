"""``Report`` in, ``Publication`` out: packing a folder and sending it to the Hub."""
