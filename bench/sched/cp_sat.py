"""Solves placement problems with OR-tools CP-SAT.

Reads one problem in JSON per line, writes one answer per line: the status,
cost, bound and the seconds that CP-SAT itself took, of
processors (building the model is not counted). The model says what control_plane::optimise::Problem says, and
shares nothing with it.
"""

import json
import sys
import time

from ortools.sat.python import cp_model


def excess(model, terms, weight, expression, most):
    """Adds weight * max(0, expression) to the cost."""
    if weight > 0 and most > 0:
        over = model.new_int_var(0, most, "")
        model.add(over >= expression)
        terms.append(weight * over)


def hinges(model, terms, count, bounds, rules):
    for at, weight, side in rules:
        if side == "above":
            excess(model, terms, weight, count - at, bounds[1] - at)
        else:
            excess(model, terms, weight, at - count, at - bounds[0])


def limit(model, terms, counts, most, rule):
    total = sum(counts)
    if rule["max"] < most:
        model.add(total <= rule["max"])
    excess(model, terms, rule["weight"], total - rule["soft_max"], most - rule["soft_max"])


def build(problem):
    model = cp_model.CpModel()
    terms, vcpus, slices = [], [], []
    for node in problem["nodes"]:
        x = model.new_int_var(*node["vcpus"], "")
        y = model.new_int_var(*node["slices"], "")
        vcpus.append(x)
        slices.append(y)
        hinges(model, terms, x, node["vcpus"], node["vcpu_hinges"])
        hinges(model, terms, y, node["slices"], node["slice_hinges"])
        excess(
            model, terms, problem["far_weight"], y - problem["ratio"] * x, node["slices"][1]
        )
        if node["open"] > 0:
            is_open = model.new_bool_var("")
            model.add(x <= node["vcpus"][1] * is_open)
            model.add(y <= node["slices"][1] * is_open)
            terms.append(node["open"] * is_open)
    model.add(sum(vcpus) == problem["vcpus"])
    model.add(sum(slices) == problem["slices"])
    for index, domain in enumerate(problem["domains"]):
        members = [i for i, node in enumerate(problem["nodes"]) if node["domain"] == index]
        limit(model, terms, [vcpus[i] for i in members], problem["vcpus"], domain["vcpus"])
        limit(model, terms, [slices[i] for i in members], problem["slices"], domain["slices"])
    model.minimize(sum(terms))
    return model


def main():
    workers, seconds = int(sys.argv[1]), float(sys.argv[2])
    for line in sys.stdin:
        model = build(json.loads(line))
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = workers
        solver.parameters.max_time_in_seconds = seconds
        before = time.process_time()
        status = solver.solve(model)
        cpu_seconds = time.process_time() - before
        answer = {
            "status": solver.status_name(status),
            "cost": round(solver.objective_value),
            "bound": round(solver.best_objective_bound),
            "cpu_seconds": cpu_seconds,
        }
        print(json.dumps(answer), flush=True)


main()
