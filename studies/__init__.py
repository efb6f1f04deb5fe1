"""Study definitions (TOML).  Data only: results go to runs/."""
