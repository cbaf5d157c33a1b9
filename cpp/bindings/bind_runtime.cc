#include <pybind11/stl.h>

#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <variant>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/submitted_call.h"
#include "engine/placement.h"
#include "engine/runtime.h"
#include "threading/node_choice.h"
#include "threading/topology.h"

namespace py = pybind11;

namespace cpumoe {

namespace {

// "auto", 1 for the machine as one node, or numbers of nodes.
using PythonNodes = std::variant<std::string, int, std::vector<int>>;

PythonNodes ToPython(NodeChoice choice) {
  if (choice.kind == NodeChoice::Kind::kAll) return "auto";
  if (choice.kind == NodeChoice::Kind::kOne) return 1;
  return std::move(choice.ids);
}

NodeChoice FromPython(PythonNodes nodes) {
  if (auto* ids = std::get_if<std::vector<int>>(&nodes)) {
    return {.kind = NodeChoice::Kind::kNamed, .ids = std::move(*ids)};
  }
  const bool one = std::holds_alternative<int>(nodes);
  return {.kind = one ? NodeChoice::Kind::kOne : NodeChoice::Kind::kAll};
}

void BindNodeChoice(py::module_& m) {
  py::class_<UsableNode>(m, "UsableNode")
      .def(py::init([](int id, std::vector<int> cpus, std::vector<int> cores) {
             return UsableNode{.id = id, .cpus = std::move(cpus), .cores = std::move(cores)};
           }),
           py::kw_only(), py::arg("id"), py::arg("cpus"), py::arg("cores"))
      .def_readonly("id", &UsableNode::id)
      .def_readonly("cpus", &UsableNode::cpus)
      .def_readonly("cores", &UsableNode::cores);
  m.def(
      "parse_nodes",
      [](const std::string& text, const std::string& name) {
        return ToPython(ParseNodeChoice(text, name));
      },
      py::arg("text"), py::arg("name"),
      "What a text chooses: \"auto\", 1, or numbers of nodes. `name` is what has the text.");
  m.def("usable_nodes", &UsableNodes, py::arg("topology"),
        "The nodes with memory, ascending, each with all CPUs that should use it.");
  m.def(
      "choose_nodes",
      [](PythonNodes nodes, const Topology& topology, const std::string& name) {
        return ChooseNodes(FromPython(std::move(nodes)), topology, name);
      },
      py::arg("nodes"), py::arg("topology"), py::arg("name"),
      "The usable nodes that are chosen, ascending; none if the machine counts as one node.");
  m.def(
      "useful_threads",
      [](const Topology& topology, const std::vector<UsableNode>& nodes) {
        return UsefulThreads(topology, nodes);
      },
      py::arg("topology"), py::arg("nodes"),
      "The number of cores, of nodes if there are any, capped by the CPU quota.");
  m.def(
      "divide_threads",
      [](int threads, const std::vector<int>& cores) { return DivideThreads(threads, cores); },
      py::arg("threads"), py::arg("cores"),
      "The threads of each node, in proportion to its number of cores.");
}

}  // namespace

void BindRuntime(py::module_& m) {
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const std::system_error& e) {
      PyErr_SetString(PyExc_OSError, e.what());
    }
  });

  py::class_<CpuLocation>(m, "CpuLocation")
      .def_readonly("cpu", &CpuLocation::cpu)
      .def_readonly("core", &CpuLocation::core)
      .def_readonly("package", &CpuLocation::package)
      .def_readonly("node", &CpuLocation::node)
      .def_readonly("l3", &CpuLocation::l3);
  py::class_<NumaNode>(m, "NumaNode")
      .def_readonly("id", &NumaNode::id)
      .def_readonly("cpus", &NumaNode::cpus)
      .def_readonly("cores", &NumaNode::cores)
      .def_readonly("memory_bytes", &NumaNode::memory_bytes)
      .def_readonly("memory_node", &NumaNode::memory_node);
  py::class_<Topology>(m, "Topology")
      .def_readonly("cpus", &Topology::cpus)
      .def_readonly("cores", &Topology::cores)
      .def_readonly("nodes", &Topology::nodes)
      .def_readonly("other_nodes", &Topology::other_nodes)
      .def_readonly("l3_groups", &Topology::l3_groups)
      .def_readonly("quota", &Topology::quota)
      .def_readonly("default_threads", &Topology::default_threads);
  m.def(
      "topology",
      [](const std::string& sysfs, const std::string& proc, std::optional<std::vector<int>> cpus) {
        return ReadTopology({.sysfs = sysfs,
                             .proc = proc,
                             .affinity = cpus ? *std::move(cpus) : ProcessAffinity()});
      },
      py::kw_only(), py::arg("sysfs") = "/sys", py::arg("proc") = "/proc",
      py::arg("affinity") = py::none(),
      "The CPUs and NUMA nodes that this process may use, or those of a made-up machine.");

  BindNodeChoice(m);

  py::class_<MemoryNode>(m, "MemoryNode")
      .def_readonly("id", &MemoryNode::id)
      .def_readonly("threads", &MemoryNode::threads);
  py::class_<Placement>(m, "Placement")
      .def_property_readonly("node", [](const Placement& p) { return p.share.node; })
      .def_property_readonly("nbytes", [](const Placement& p) { return p.share.bytes; })
      .def_property_readonly("bound", [](const Placement& p) { return p.share.bound; })
      .def_readonly("pages", &Placement::pages)
      .def_readonly("local", &Placement::local);
  py::class_<NodeThreads>(m, "NodeThreads")
      .def(py::init([](int id, int threads, std::vector<int> cpus, bool one_cpu_each) {
             return NodeThreads{.memory = {.id = id, .threads = threads},
                                .cpus = std::move(cpus),
                                .one_cpu_each = one_cpu_each};
           }),
           py::kw_only(), py::arg("id"), py::arg("threads"), py::arg("cpus"),
           py::arg("one_cpu_each"));

  py::class_<Runtime, std::shared_ptr<Runtime>>(m, "Runtime")
      .def(py::init([](int threads, std::vector<int> cpus, bool callers_compute,
                       std::vector<NodeThreads> nodes) {
             return Runtime::Create(
                 {.node = {.threads = threads, .cpus = std::move(cpus), .nodes = std::move(nodes)},
                  .callers_compute = callers_compute});
           }),
           py::kw_only(), py::arg("threads"), py::arg("cpus"), py::arg("callers_compute") = true,
           py::arg("nodes") = std::vector<NodeThreads>())
      .def_property_readonly("nodes", &Runtime::nodes,
                             "The NUMA nodes of the threads; none: the runtime does not look at "
                             "nodes.")
      .def("close", &Runtime::Close, py::call_guard<py::gil_scoped_release>());

  py::class_<SubmittedCall>(m, "SubmittedCall")
      .def("done", &SubmittedCall::Done)
      .def("wait", &SubmittedCall::Wait, py::call_guard<py::gil_scoped_release>())
      .def("wait_for", &SubmittedCall::WaitFor, py::arg("seconds"),
           py::call_guard<py::gil_scoped_release>());
}

}  // namespace cpumoe
