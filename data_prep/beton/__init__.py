""".beton files, as FFCV reads them: raw or JPEG images with labels, all of one size."""

from data_prep.beton.format import BetonInfo, check_beton, file_bytes
from data_prep.beton.stream import BetonStream, read_beton
from data_prep.beton.writer import BetonWriter, write_beton

__all__ = ["BetonInfo", "BetonStream", "BetonWriter", "check_beton", "file_bytes", "read_beton", "write_beton"]
