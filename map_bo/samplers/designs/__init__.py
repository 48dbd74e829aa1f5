"""Designs: points that are chosen before anything is measured."""
