"""Files that people have: rows, tables, images, videos. Whatever is wrong is named by file, row and field."""
