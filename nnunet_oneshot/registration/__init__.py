"""Registration of an atlas: ``pair`` for two volumes, ``dataset`` for a dataset, ``files`` for two image files."""
