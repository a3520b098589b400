"""Pages to read: tables and pictures as one HTML file that needs nothing beside it."""
