"""Reporting: costs, distances to the teacher, curves and model cards; nothing here travels to the Hub.

The programs `conversion/report.py` and `conversion/model_card.py` call these functions.
"""
