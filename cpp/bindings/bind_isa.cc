#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "dispatch/cpu_features.h"
#include "dispatch/variant_loader.h"
#include "variant/build_id.h"

namespace py = pybind11;

namespace cpumoe {
namespace {

std::vector<FormatInfo> Formats(const std::string& isa, const std::string& origin) {
  return FormatsOf(LoadVariant(isa, origin));
}

}  // namespace

void BindIsa(py::module_& m) {
  py::class_<IsaRow>(m, "IsaRow")
      .def_readonly("name", &IsaRow::name)
      .def_readonly("built", &IsaRow::built)
      .def_readonly("features", &IsaRow::features);
  py::class_<TileStep>(m, "TileStep")
      .def_readonly("name", &TileStep::name)
      .def_readonly("question", &TileStep::question)
      .def_readonly("passed", &TileStep::passed)
      .def_readonly("found", &TileStep::found);
  py::class_<FormatInfo>(m, "FormatInfo")
      .def_readonly("name", &FormatInfo::name)
      .def_readonly("code_bits", &FormatInfo::code_bits)
      .def_readonly("scale_depth", &FormatInfo::scale_depth)
      .def_readonly("scale_bytes", &FormatInfo::scale_bytes);
  py::class_<FewTokens>(m, "FewTokens")
      .def_readonly("crossover", &FewTokens::crossover)
      .def_readonly("most", &FewTokens::most);

  py::register_exception<VariantError>(m, "VariantError", PyExc_RuntimeError);
  m.def("version", [] { return kVersion; }, "The version that the module was built as.");
  m.def(
      "build_id", [] { return kBuildId; },
      "The id that a variant's library must have to be used by this module.");
  m.def("known_isas", &KnownIsas, "All ISA variants, from the most general to the most special.");
  m.def("cpu_features", &DetectFeatures,
        "The CPU features that ISA variants need and that this CPU has.");
  m.def("tile_steps", &DetectTileSteps,
        "The conditions for AMX, in order, and whether each holds; None: not checked.");
  m.def("supported_isas", [] { return SupportedIsas(DetectFeatures()); });
  m.def(
      "usable_isas", [] { return UsableIsas(DetectFeatures()); },
      "`supported_isas`. Raises ValueError if there is none.");
  m.def(
      "select_isa",
      [](const std::optional<std::string>& requested, const std::string& argument) {
        const IsaChoice choice = SelectIsa(requested, argument, DetectFeatures());
        return std::pair(choice.name, choice.origin);
      },
      py::arg("requested"), py::arg("argument"),
      "The variant to use, and what named it: `argument` or CPUMOE_ISA. Raises ValueError.");
  m.def(
      "open_variant",
      [](const std::string& name, const std::string& origin) -> std::string {
        return LoadVariant(name, origin).isa;
      },
      py::arg("name"), py::arg("origin"),
      "Opens a variant's library and returns the ISA that it says it was compiled for. Raises "
      "VariantError if the library is missing, damaged or of another build.");
  m.def("formats", &Formats, py::arg("isa"), py::arg("origin"), "The weight formats of a variant.");
  m.def(
      "few_tokens",
      [](const std::string& isa, const std::string& origin, const std::string& format) {
        return FindFormat(LoadVariant(isa, origin), format).few_tokens;
      },
      py::arg("isa"), py::arg("origin"), py::arg("format"),
      "The most tokens of an expert for which a variant uses its few-token kernels for a weight "
      "format, and could.");
  m.def("assume_features", &AssumeFeatures, py::arg("features"),
        "For tests under an instruction emulator: pretend that the CPU has these features.");
}

}  // namespace cpumoe
