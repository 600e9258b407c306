"""How a row is kept, one encoding a file: a module here that has an `ENCODING` is one.

fp16 and fp32 are stored raw, since compressing fp16 without loss saves 7 to 14 % and costs more time than reading it.
Every chunk of every array ends in a crc32c.
"""
