"""Which host gets which rows, and what follows when one dies, hangs or slows down; pure state machines."""
