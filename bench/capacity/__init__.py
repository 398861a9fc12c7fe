"""The capacity search: the highest rate that keeps an attainment."""
