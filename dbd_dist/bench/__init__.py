"""The measured benchmarks behind `dbd bench`: one file each, rows of figures out. Nothing here is asserted on."""
