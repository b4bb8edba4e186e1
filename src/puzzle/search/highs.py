"""A linear or mixed-integer program for HiGHS, in dense arrays."""

from collections.abc import Mapping
from dataclasses import dataclass

import highspy
import numpy as np


@dataclass(frozen=True)
class Answer:
    """What HiGHS returns.

    `values` [columns] is empty where it has no solution. `row_duals` [rows] are those of a linear
    program; `bound` is that of an integer program: no solution is below it.
    """

    infeasible: bool
    values: np.ndarray
    row_duals: np.ndarray
    bound: float


class Model:
    """Minimise costs . x within lower <= rows x <= upper and 0 <= x <= largest.

    The arrays are set by whoever makes the model: at first no row has a limit, every `largest` is 1
    and nothing is `integral`.
    """

    def __init__(self, costs: np.ndarray, rows: np.ndarray, base: float = 0.0) -> None:
        """`costs` [columns], `rows` [rows, columns]; `base` is added to the objective."""
        self.costs, self.rows, self.base = costs, rows, base
        self.lower = np.full(len(rows), -np.inf)
        self.upper = np.full(len(rows), np.inf)
        self.largest = np.ones(len(costs))
        self.integral = np.zeros(len(costs), dtype=bool)

    def run(self, options: Mapping[str, float]) -> Answer:
        """Solve with these options of HiGHS, by their names there."""
        highs, known = self._solved(options), highspy.HighsModelStatus
        status = highs.getModelStatus()
        says_none = status == known.kInfeasible and bool(self.integral.any())
        if says_none or status == known.kSolveError:
            # In 1 of 5,000 small programs presolve left a solution that breaks a row; of another
            # one with solutions it said that there is none.
            highs = self._solved({**options, "presolve": "off"})
        solution = highs.getSolution()
        return Answer(
            infeasible=highs.getModelStatus() == highspy.HighsModelStatus.kInfeasible,
            values=np.array(solution.col_value),
            row_duals=np.array(solution.row_dual),
            bound=float(highs.getInfo().mip_dual_bound),
        )

    def _solved(self, options: Mapping[str, float | str]) -> highspy.Highs:
        highs = highspy.Highs()
        highs.setOptionValue("output_flag", False)
        for option, value in options.items():
            highs.setOptionValue(option, value)
        highs.passModel(self._linear_program())
        highs.run()
        return highs

    def _linear_program(self) -> highspy.HighsLp:
        """The model with its rows in compressed form, without zeros."""
        program = highspy.HighsLp()
        program.num_row_, program.num_col_ = self.rows.shape
        program.offset_ = self.base
        program.col_cost_ = self.costs.astype(float)
        program.col_lower_, program.col_upper_ = np.zeros(len(self.costs)), self.largest
        program.row_lower_, program.row_upper_ = self.lower, self.upper
        rows, columns = np.nonzero(self.rows)
        entries = np.bincount(rows, minlength=len(self.rows))
        program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        program.a_matrix_.start_ = np.cumsum([0, *entries]).astype(np.int32)
        program.a_matrix_.index_ = columns.astype(np.int32)
        program.a_matrix_.value_ = self.rows[rows, columns]
        if self.integral.any():
            kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
            program.integrality_ = [kinds[int(integral)] for integral in self.integral]
        return program
