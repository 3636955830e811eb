"""The scripts. An installed package holds them as improved_diffusion.scripts."""
