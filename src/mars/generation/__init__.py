"""Ids in, more ids out; knows neither pixels nor strings."""
