// The part of Observable Plot that the report's charts use; the rest is shaken off.
export {axisX, axisY, barX, dot, gridX, line, plot, pointer, ruleX, ruleY, text, tip} from "@observablehq/plot";
