"""The answers of each endpoint get their token ids here: a module for each, and what several share."""
