"""The trunk of Llama 4 as pure torch; knows no files, no network and no clock."""
