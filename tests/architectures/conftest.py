"""What pytest leaves alone here: these modules import packages that only the `zoo` session installs."""

collect_ignore = ["transformers_family.py", "timm_family.py", "diffusers_family.py"]
